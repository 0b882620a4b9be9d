"""A chat on QQ, from what a person writes to what is on the screen."""

from __future__ import annotations

from fake_agent import FakeAgent, streamed
from fake_qq import FakeQQ
from gateway import Gateway
from waiting import eventually, stays


def test_a_long_answer_comes_in_five_messages_and_the_rest_with_the_next_ones() -> None:
    paragraphs = [f"Paragraph {number} " + "x" * 1200 for number in range(20)]
    with FakeQQ() as qq, FakeAgent() as agent:
        account = qq.settings(allowFrom=["PERSON"], groupAllowFrom=["MEMBER"],
                              groups={"GROUP": {}})
        with Gateway(None, agent, channels={"qq": account}) as gateway:
            eventually(lambda: gateway.rows("SELECT 1 FROM states"))
            # It takes so long that "typing" is shown, which counts as a message.
            agent.enqueue(streamed(*(f"{each}\n\n" for each in paragraphs), pause_s=0.2))
            qq.say("tell me everything")
            eventually(lambda: "write anything" in "".join(qq.screen("PERSON")))
            first = stays(lambda: qq.screen("PERSON"), 0.3)
            assert len(first) + len(qq.typed) <= 5 and qq.typed == ["PERSON"]
            qq.drop()
            qq.say("go on")
            eventually(lambda: "You said: go on" in qq.screen("PERSON"))
            assert "Paragraph 19 " not in "".join(qq.screen("PERSON"))
            qq.say("/more")
            eventually(lambda: "Paragraph 19 " in qq.screen("PERSON")[-1])
            qq.say("hi", sender="MEMBER", group="GROUP")
            eventually(lambda: qq.screen("GROUP") == ["You said: [Person MEMBER]: hi"])
            whole = "".join(qq.screen("PERSON"))
    assert [whole.count(f"Paragraph {number} ") for number in range(20)] == [1] * 20
    assert not qq.faults and len(qq.sent(6)) == 1
