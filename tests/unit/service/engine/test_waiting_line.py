"""The waiting line, compared with a simple sort."""

from __future__ import annotations

import math
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from service.engine.request import Image
from service.engine.waiting_line import WaitingLine
from tests.counts import count
from tests.fakes import generation, params

CLIENTS = ["a", "b", "c", "d"]


def image(sequence: int, order: float, guided: bool, client: str) -> Image:
    request = generation(str(sequence), params(3, 2.0 if guided else 1.0), client=client)
    made = Image(request=request, position=0, submitted_at=0.0)
    made.order = (order, sequence)
    return made


@settings(max_examples=count(2000))
@given(st.integers(0, 2**32), st.integers(1, 80), st.integers(1, 16))
def test_the_front_of_the_line_has_the_most_urgent_images_of_each_width(seed: int, operations: int, most: int) -> None:
    draw = random.Random(seed)
    ahead: set[str] = set()
    line, waiting = WaitingLine(ahead), list[Image]()
    for sequence in range(operations):
        chance = draw.random()
        if chance < 0.25 and waiting:
            leaving = draw.sample(waiting, draw.randint(1, len(waiting)))
            if draw.random() < 0.5:  # the most urgent ones
                leaving = sorted(waiting, key=lambda i: i.order)[: len(leaving)]
            for one in leaving:
                line.remove(one)
            waiting = [one for one in waiting if one not in leaving]
        elif chance < 0.4:
            client = draw.choice(CLIENTS)
            ahead.symmetric_difference_update({client})
            line.moved(client)
        else:
            waiting.append(image(sequence, draw.randrange(9), draw.random() < 0.4, draw.choice(CLIENTS)))
            line.push(waiting[-1])
    assert len(line) == len(waiting)
    assert set(line) == set(waiting)
    front = line.front(most)
    assert len(set(front)) == len(front)
    for rows in (1, 2):
        ordered = sorted((i for i in waiting if i.rows == rows), key=lambda i: (i.client in ahead, i.order))
        assert set(ordered[: math.ceil(most / rows)]) <= set(front)
