"""The mock server by hand, until Ctrl-C: ``python -m loadtest.mock_server --port 8000 --ttft-ms 200 --itl-ms 20``."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from loadtest.errors import LoadTestError
from loadtest.mock_server import __doc__ as package_doc
from loadtest.mock_server.config import FAULTS, MockConfig
from loadtest.mock_server.server import MockServer
from loadtest.mock_server.token_log import TokenLog


def _fault(text: str) -> tuple[str, int]:
    name, _, every = text.partition(":")
    if name not in FAULTS or not every.isdigit() or int(every) < 1:
        raise argparse.ArgumentTypeError(f"expected FAULT:EVERY with FAULT one of {', '.join(FAULTS)}")
    return name, int(every)


def main(argv: list[str] | None = None) -> int:
    """Run the mock server until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.mock_server", description=package_doc)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free port and prints it (default: 8000)")
    parser.add_argument("--ttft-ms", type=float, default=50.0, help="delay of the first token (default: 50)")
    parser.add_argument("--itl-ms", type=float, default=10.0, help="delay between tokens (default: 10)")
    parser.add_argument("--tokens-per-chunk", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=0, help="requests served at once; 0 is no limit")
    parser.add_argument(
        "--fault", type=_fault, action="append", default=[], metavar="FAULT:EVERY", help=", ".join(FAULTS)
    )
    parser.add_argument("--stall-at-s", type=float, default=-1.0, help="freeze this long after the first request")
    parser.add_argument("--stall-s", type=float, default=0.0, help="length of the freeze")
    parser.add_argument("--model", action="append", metavar="NAME", help="served model; may be given again")
    parser.add_argument("--no-tokenize", action="store_true", help="have no /tokenize, unlike vLLM")
    parser.add_argument("--no-usage", action="store_true", help="send no usage")
    parser.add_argument("--owner", default="vllm", help="owned_by of the models (default: vllm)")
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="write one line a request there: when each of its tokens left"
    )
    args = parser.parse_args(argv)
    config = MockConfig(
        args.ttft_ms,
        args.itl_ms,
        args.tokens_per_chunk,
        args.capacity,
        dict(args.fault),
        args.stall_at_s,
        args.stall_s,
        tuple(args.model or ("mock-model",)),
        not args.no_tokenize,
        not args.no_usage,
        args.owner,
    )

    async def serve() -> None:
        server = MockServer(config, args.host, args.port, log=TokenLog(args.log))
        await server.start()
        print(f"mock server on {server.url}", flush=True)
        await asyncio.Event().wait()

    try:
        asyncio.run(serve())
    except KeyboardInterrupt:
        return 0
    except OSError as error:
        print(f"mock_server: cannot listen on {args.host}:{args.port}: {error.strerror}", file=sys.stderr)
        return 2
    except LoadTestError as error:
        print(f"mock_server: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
