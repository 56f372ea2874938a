"""The queue between the services, on Redis Streams: bounded, at least once, handed on exactly once.

The streams' names are in services.common.contract.keys, what they carry in services.common.contract.messages.

    queue = Queue(redis)
    await queue.feed(message, position=7)                       # the gateway: adds, and moves the job's cursor from 7 to 8

    async def generate(delivery: Delivery[PromptQueued]) -> None:
        await delivery.hand_on(CANDIDATES, await make_candidates(delivery.message), counts={"sampled": 1})

    await Consumer(redis, PROMPTS, model=PromptQueued, on_dead=as_failed).run(each(generate))

A message is in one stream at a time. A consumer that takes one holds it by heartbeats; when they cease, another takes it
over. What ends the holding is one script, HAND_OVER: if the message is still the consumer's and there is room in the next
stream, the follow-up is added, the message deleted and the job's counts moved, all or nothing. Unavailable is not failure:
such a message goes back uncounted, and the consumer waits before it takes more. Other errors, and crashes, count as tries; a
message that was tried is retried alone, so that it takes no neighbours with it; after `max_tries` it goes to the stream of
dead messages with the reason. Messages of jobs that have ended are dropped, when taken and when handed over.

Of a message only its job and its round are known here, whose counts and whose end they are; not what it means.
"""

from services.common.queue.consumer import Consumer, Delivery, consuming, each
from services.common.queue.streams import DeadLetter, Queue, connect, unanswered

__all__ = ["Consumer", "DeadLetter", "Delivery", "Queue", "connect", "consuming", "each", "unanswered"]
