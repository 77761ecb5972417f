"""Watchers for bench.py, in a process of their own: `crowd.py ADDRESS JOB COUNT` prints `ready`, then at SIGTERM how
many events were read."""

import asyncio
import contextlib
import signal
import sys
from typing import Any

import grpc

from hone.rpc import calls
from hone.rpc.channel import channel_options
from hone.v1 import training_service_pb2_grpc


async def main(address: str, job: str, count: int) -> None:
    """Watch until SIGTERM."""
    read = 0
    async with grpc.aio.insecure_channel(address, options=channel_options(address)) as channel:
        stub: Any = training_service_pb2_grpc.TrainingServiceStub(channel)  # type: ignore[no-untyped-call]
        connected = asyncio.Semaphore(0)

        async def watch() -> None:
            nonlocal read
            method, message = calls.watch("default", job, after_seq=0)
            first = True
            async for answer in getattr(stub, method)(message):
                if first:
                    connected.release()
                first = False
                read += len(answer.events)

        tasks = [asyncio.create_task(watch()) for _ in range(count)]
        for _ in range(count):
            await connected.acquire()
        print("ready", flush=True)
        stopped = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
        await stopped.wait()
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, grpc.RpcError):
            await asyncio.gather(*tasks, return_exceptions=True)
    print(read, flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
