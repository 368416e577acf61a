"""Chat through a Ray Serve handle, without HTTP: from any process on the service's Ray cluster.

scripts/up --detach
.venv/bin/python examples/ray_handle.py
"""

from __future__ import annotations

import logging
import os
import sys
from typing import Any

from deployments.local.home import Home


def main() -> int:
    home = Home.from_env()
    state = home.read_state()
    if state is None or not home.is_running():
        print("the service is not up: scripts/up --detach", file=sys.stderr)
        return 1
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(home.ray_token)}
    import ray
    from ray import serve

    ray.init(address=state.ray_address, logging_level=logging.ERROR, log_to_driver=False)
    handle = serve.get_app_handle("sinkserve")
    conversation = handle.create_conversation.remote({"system": "You give short answers."}).result()
    for text in ("What is a lighthouse?", "Who lives in one?"):
        message = {"role": "user", "content": text}
        body = {"model": conversation["model"], "conversation": conversation["id"]}
        streaming = handle.options(stream=True)
        chunks: Any = streaming.chat_stream.remote({**body, "messages": [message]})
        print(f"you> {text}")
        for chunk in chunks:
            for choice in chunk["choices"]:
                print(choice["delta"].get("content", ""), end="", flush=True)
        print()
    ray.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
