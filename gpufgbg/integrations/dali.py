"""The stream as an external source of NVIDIA DALI's pipelines.

::

    with gpufgbg.stream("DATASET", batch_size=64) as samples:

        @pipeline_def(batch_size=64, num_threads=2, device_id=0)
        def pipe():
            image, mask = external_source(samples)
            return fn.resize(image, size=(128, 128)), mask
"""

from __future__ import annotations

from collections import deque
from typing import Any

from gpufgbg.checks import whole
from gpufgbg.exceptions import DeviceError, OptionError
from gpufgbg.streaming import SampleStream, StreamBatch

__all__ = ["StreamSource", "external_source"]


class StreamSource:
    """What ``fn.external_source(source=..., batch=True, no_copy=True)`` asks: a stream's batches as tuples.

    With ``no_copy`` DALI reads the arrays where they are, and later: the source keeps the last batches alive.

    Parameters
    ----------
    stream : SampleStream
        Without ``reuse``; its batches are no larger than the pipeline's.
    keep : int
        Batches kept alive, 1 to 1,024; more than the pipeline's ``prefetch_queue_depth`` by two or more.

    Raises
    ------
    OptionError
        The stream uses its arrays again, or ``keep`` is out of range.
    """

    def __init__(self, stream: SampleStream, keep: int = 8) -> None:
        if not isinstance(stream, SampleStream):
            raise OptionError("stream", f"got {stream!r}, expected what gpufgbg.stream gives")
        if stream.reuses:
            raise OptionError("stream", "it uses its arrays again while DALI reads them: make it without reuse")
        self.stream = stream
        self._kept: deque[StreamBatch] = deque(maxlen=whole("keep", keep, 1, 1024))

    def __iter__(self) -> StreamSource:
        return self

    def __next__(self) -> tuple[Any, ...]:
        """(image, mask), or (image, mask, depth): (N, H, W, 3), (N, H, W) and (N, H, W), all uint8."""
        batch = next(self.stream)
        self.stream.synchronize()  # DALI waits for no stream of ours where it makes no copy
        self._kept.append(batch)
        arrays = (batch.image, batch.mask)
        return arrays if batch.depth is None else (*arrays, batch.depth.grey)

    @property
    def layouts(self) -> list[str]:
        """DALI's names of the arrays' axes."""
        return ["HWC", "HW", "HW"] if self.stream.depth is not None else ["HWC", "HW"]


def external_source(stream: SampleStream, keep: int = 8) -> Any:
    """DALI's external source of a stream, on the stream's device, without a copy; call it in a pipeline's definition.

    Parameters
    ----------
    stream, keep
        As for `StreamSource`. The stream's last batch ends the pipeline with StopIteration.

    Returns
    -------
    list of DataNode
        image, mask, and depth where the stream has a model.

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
    source = StreamSource(stream, keep)
    return fn.external_source(
        source=source,
        num_outputs=len(source.layouts),
        layout=source.layouts,
        batch=True,
        device="cpu" if stream.device == "cpu" else "gpu",
        no_copy=True,
    )
