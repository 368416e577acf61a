"""The official `openai` client, both ways: resending the history, and naming the conversation.

scripts/up --detach
.venv/bin/python examples/openai_client.py [URL]
"""

from __future__ import annotations

import sys

from openai import OpenAI
from openai.types.chat import ChatCompletionMessageParam


def resending(client: OpenAI, model: str) -> None:
    """As with any service: the whole history each time. Only the new turn is computed."""
    messages: list[ChatCompletionMessageParam] = []
    for text in ("Name a bird.", "And a fish?"):
        messages.append({"role": "user", "content": text})
        reply = client.chat.completions.create(model=model, messages=messages, max_tokens=60)
        answer = reply.choices[0].message.content or ""
        messages.append({"role": "assistant", "content": answer})
        usage = reply.usage
        details = usage.prompt_tokens_details if usage else None
        cached = details.cached_tokens if details else 0
        print(f"you> {text}\n{answer}\n[{cached} tokens were still in the cache]")


def naming(client: OpenAI, model: str) -> None:
    """The conversation lives with the service: send only what is new, at any age."""
    conversation: str | None = None
    for text in ("Name a tree.", "And a flower?"):
        chunks = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": text}],
            stream=True,
            max_tokens=60,
            extra_body={"conversation": conversation} if conversation else {},
        )
        print(f"you> {text}")
        for chunk in chunks:
            extra = chunk.model_extra or {}
            conversation = extra.get("conversation", {}).get("id", conversation)
            for choice in chunk.choices:
                print(choice.delta.content or "", end="", flush=True)
        print()


def main() -> None:
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    client = OpenAI(base_url=f"{url}/v1", api_key="-")
    model = client.models.list().data[0].id
    resending(client, model)
    naming(client, model)


if __name__ == "__main__":
    main()
