"""One data set made by many devices: a driver hands out shard numbers, workers make whole shards.

Samples are pure functions, so that handing out numbers is all there is to do. The `driver` holds the data set's
bookkeeping and a queue of shards; a `worker` has one device, asks for a shard whenever it can begin one, makes it
with the same pipeline as a run on that device alone, publishes it, and tells the driver, which records it. What a
worker held that died or hangs is given out again. Workers are processes of this machine (`processes`) or Ray actors
(`cluster`); driver and worker are the same for both.
"""

__all__: list[str] = []
