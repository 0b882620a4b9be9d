"""A chat on Discord, from what a person writes to what is on the screen."""

from __future__ import annotations

from fake_agent import FakeAgent, streamed
from fake_discord import BOT_ID, FakeDiscord
from gateway import Gateway
from waiting import eventually, stays


def test_a_chat_goes_on_over_cut_connections_and_a_kill() -> None:
    with FakeDiscord() as discord, FakeAgent() as agent:
        account = {"botToken": discord.token, "apiRoot": discord.url, "allowFrom": ["1000"],
                   "guilds": {"7": {"channels": {"70": {}}}}}
        dm = discord.dm("1000")
        with Gateway(None, agent, channels={"discord": {"accounts": {"mine": account}}}) as gateway:
            eventually(lambda: gateway.rows("SELECT 1 FROM states"))
            agent.enqueue(streamed(*(f"This is sentence {n}. " for n in range(6)), pause_s=0.4))
            discord.say("tell me")
            first = eventually(lambda: discord.screen(dm))
            assert "sentence 5" not in first[0]
            eventually(lambda: "sentence 5" in discord.screen(dm)[0])
            discord.drop()
            discord.say("not for the bot", guild="7", channel="70")
            discord.say(f"<@{BOT_ID}> hi", guild="7", channel="70")
            eventually(lambda: discord.screen("70") == ["You said: [Person 1000]: hi"])
            assert discord.called("POST", "messages")[-1]["message_reference"]
            agent.enqueue(streamed("x" * 50, "never", pause_s=30))
            discord.say("killed in the middle")
            eventually(lambda: agent.running)
            gateway.kill()
            discord.say("while it was away")
            gateway.start()
            eventually(lambda: "away" in "".join(discord.screen(dm)))
            assert stays(lambda: len(discord.screen(dm)), 0.5) in (2, 3)
        answers = discord.screen(dm)[1:]
    assert "".join(answers).count("killed in the middle") == 1
    assert "".join(answers).count("while it was away") == 1
    assert not discord.faults and not discord.pings
