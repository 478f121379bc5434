"""The stream as an external source of NVIDIA DALI's pipelines.

::

    with gpufgbg.stream("DATASET", batch_size=64) as samples:

        @pipeline_def(batch_size=64, num_threads=2, device_id=0)
        def pipe():
            image, mask = external_source(samples)
            return fn.resize(image, size=(128, 128)), mask

With ``labels=True`` index, background, foreground, flip and boxes are further outputs. The stream's last batch ends
the pipeline's epoch; after ``pipeline.reset()`` the stream's epochs come again, in the same order. For a new order
each time leave the stream without ``epochs``, and run the pipeline ``len(samples)`` times an epoch.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from gpufgbg.checks import whole
from gpufgbg.exceptions import DeviceError, OptionError
from gpufgbg.streaming import SampleStream, StreamBatch, _flag

__all__ = ["StreamSource", "external_source"]

_LABELS = ("index", "background", "foreground", "flip")  # and boxes


class StreamSource:
    """What ``fn.external_source(source=..., batch=True, no_copy=True)`` asks: a stream's batches as tuples.

    With ``no_copy`` DALI reads the arrays where they are, and later: the source keeps the last batches alive.

    Parameters
    ----------
    stream : SampleStream
        Without ``reuse``; its batches are no larger than the pipeline's.
    keep : int
        Batches kept alive, 1 to 1,024; more than the pipeline's ``prefetch_queue_depth`` by two or more.
    labels : bool
        Give index, background, foreground, flip and boxes too.

    Raises
    ------
    OptionError
        The stream uses its arrays again, or ``keep`` or ``labels`` is out of range.
    """

    def __init__(self, stream: SampleStream, keep: int = 8, labels: bool = False) -> None:
        if not isinstance(stream, SampleStream):
            raise OptionError("stream", f"got {stream!r}, expected what gpufgbg.stream gives")
        if stream.reuses:
            raise OptionError("stream", "it uses its arrays again while DALI reads them: make it without reuse")
        self.stream = stream
        self.labels = _flag("labels", labels)
        self._first, self._over = stream.epoch, False
        self._kept: deque[StreamBatch] = deque(maxlen=whole("keep", keep, 1, 1024))

    def __iter__(self) -> StreamSource:
        return self

    def __next__(self) -> tuple[Any, ...]:
        """The next batch's arrays, on the stream's device.

        image (N, H, W, 3) and mask (N, H, W), uint8; depth (N, H, W) uint8 where the stream has a model; with labels
        index (N,) int64, background (N,) and foreground (N,) int32, flip (N,) bool and boxes (N, 4) int32. Asked
        again after the last batch, as DALI does when its pipeline is reset, it begins with the epoch that the stream
        was at when the source was made.

        Raises
        ------
        StopIteration, OptionError, InputError
            As `SampleStream` does.
        """
        if self._over and self.stream.ended:
            self.stream.set_epoch(self._first)
        self._over = False
        try:
            batch = next(self.stream)
        except StopIteration:
            self._over = True
            raise
        arrays = [batch.image, batch.mask]
        if batch.depth is not None:
            arrays.append(batch.depth.grey)
        if self.labels:
            arrays += [getattr(batch.device_labels, name) for name in _LABELS] + [batch.boxes]
        self.stream.synchronize()  # DALI waits for no stream of ours where it makes no copy
        self._kept.append(batch)
        return tuple(arrays)

    @property
    def layouts(self) -> list[str]:
        """DALI's names of the arrays' axes."""
        pictures = ["HWC", "HW", "HW"] if self.stream.depth is not None else ["HWC", "HW"]
        return pictures + [""] * (len(_LABELS) + 1) * self.labels


def external_source(stream: SampleStream, keep: int = 8, labels: bool = False) -> Any:
    """DALI's external source of a stream, on the stream's device, without a copy; call it in a pipeline's definition.

    Parameters
    ----------
    stream, keep, labels
        As for `StreamSource`. The stream's last batch ends the pipeline with StopIteration; after its ``reset`` the
        stream's epochs come again.

    Returns
    -------
    list of DataNode
        image, mask, depth where the stream has a model; with labels index, background, foreground, flip and boxes.

    Raises
    ------
    DeviceError
        DALI is not installed.
    OptionError
        As `StreamSource`.
    """
    try:
        from nvidia.dali import fn
    except ImportError:
        raise DeviceError(
            "gpufgbg.integrations.dali: NVIDIA DALI is not installed: pip install 'gpufgbg[dali]'"
        ) from None
    source = StreamSource(stream, keep, labels)
    return fn.external_source(
        source=source,
        num_outputs=len(source.layouts),
        layout=source.layouts,
        batch=True,
        device="cpu" if stream.device == "cpu" else "gpu",
        no_copy=True,
    )
