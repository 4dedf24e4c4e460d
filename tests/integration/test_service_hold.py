"""An engine on hold: nothing runs, nothing is lost, deadlines still end contexts; the same tokens afterwards."""

from __future__ import annotations

import asyncio

import pytest
from caesura.runtime.errors import DeadlineExceeded, InvalidRequest
from caesura.runtime.sampling import SamplingParams

from tests.integration.server_client import embedded_service, nothing_left

GREEDY = SamplingParams(max_new_tokens=60, temperature=0.0, ignore_eos=True)


@pytest.mark.parametrize("retract", [False, True])
def test_a_held_engine_goes_on_where_it_was(retract: bool) -> None:
    async def main() -> None:
        service = embedded_service()
        ids = service.tokenizer.encode("What is 3 plus 4? " * 8)

        async def generate(hold_after: int | None) -> list[int]:
            handle, out = await service.open("hold"), []
            other = await service.open("hold")
            await handle.append(ids)
            await other.append(ids[:40])
            await other.prefill()
            async for chunk in handle.generate(GREEDY):
                out += chunk.token_ids
                if hold_after is not None and len(out) >= hold_after:
                    hold_after = None
                    await service.hold(retract=retract)
                    steps = service.stats()["steps"]
                    late = await service.open("hold", deadline_s=0.05)
                    await late.append(ids)
                    with pytest.raises(DeadlineExceeded):
                        await late.prefill()
                    stats = service.stats()
                    assert stats["steps"] == steps, "not one step, and yet the deadline was kept"
                    if retract:
                        assert stats["free_pages"] == stats["device_pages"]
                    await service.go_on()
            await other.append([5])
            await other.prefill()
            for one in (handle, other):
                await one.close()
            return out

        wanted = await generate(None)
        await service.flush_cache()
        assert await generate(5) == wanted and len(wanted) == 60
        await service.flush_cache()
        await nothing_left(service)
        service.call_now(lambda engine: engine.check())

    try:
        asyncio.run(main())
    finally:
        embedded_service().call_now(lambda engine: engine.go_on())


def test_the_likeliest_tokens_of_every_place() -> None:
    async def main() -> None:
        service = embedded_service()
        handle = await service.open("tops")
        ids = service.tokenizer.encode("What is 3 plus 4? The answer is 7. " * 20)
        await handle.append(ids)
        plain = await handle.score(1)
        scored = await handle.score_top(1, 3)
        assert [token.logprob for token in scored] == pytest.approx(plain, abs=1e-5)
        assert [token.token_id for token in scored] == ids[1:]
        for token in scored:
            logprobs = [logprob for _, logprob in token.top_logprobs]
            assert len(logprobs) == 3 and sorted(logprobs, reverse=True) == logprobs
            assert token.logprob is not None and token.logprob <= logprobs[0] + 1e-5
            if token.token_id in dict(token.top_logprobs):
                assert dict(token.top_logprobs)[token.token_id] == pytest.approx(token.logprob, abs=1e-5)
        assert await handle.score_top(len(ids), 3) == []
        with pytest.raises(InvalidRequest):
            await handle.score_top(0, 3)
        await handle.close()

    asyncio.run(main())
