"""Beam search with Python lists: slow, obvious, and it says how close its decisions were."""

import itertools

import numpy as np


def search(
    logits,
    prompt,
    width,
    new,
    *,
    length_penalty=1.0,
    early_stopping=False,
    repetition_penalty=1.0,
    stops=(),
):
    """What `logits`, a function from texts of one length to a row each, makes of a prompt.

    Returns the hypotheses as [(score, tokens)], best first, and a margin: sums of log-probabilities
    that are all off by less lead to the same hypotheses, in the same order.
    """
    live, finished, margins = [(0.0, [])], [], []

    def compare(some, others):
        """Notes by how much all sums may be off before any of these scores change places."""
        for (score, length), (other, other_length) in itertools.product(some, others):
            rates = length**-length_penalty + other_length**-length_penalty
            margins.append(abs(score - other) / rates)

    def scored(hypotheses):
        return [(score, len(text)) for score, text in hypotheses]

    def cut(ranked):
        """The `width` best of texts that are sorted by their sums."""
        if len(ranked) > width:
            margins.append((ranked[width - 1][0] - ranked[width][0]) / 2)
        return ranked[:width]

    for n in range(1, new + 1):
        candidates = []
        rows = logits([prompt + text for _, text in live])
        for (total, text), row in zip(live, rows, strict=True):
            log_probs = row - np.logaddexp.reduce(row)
            for token in set(prompt + text) if repetition_penalty != 1 else ():
                log_probs[token] *= repetition_penalty
            candidates += [(total + p, [*text, t]) for t, p in enumerate(log_probs)]
        candidates.sort(key=lambda c: -c[0])
        over = n == new
        finished += [
            (total / n**length_penalty, text)
            for total, text in cut(candidates)
            if over or text[-1] in stops
        ]
        finished.sort(key=lambda f: -f[0])
        compare(scored(finished[:width]), scored(finished[width:]))
        finished = finished[:width]
        if over:
            break
        live = cut([c for c in candidates if c[1][-1] not in stops])
        if len(finished) == width:
            if early_stopping is True:
                break
            length = new if early_stopping == "never" and length_penalty > 0 else n
            hope = live[0][0] / length**length_penalty
            over = hope <= finished[-1][0]
            # To go on, one that is worse is enough; to stop, none may be.
            compare([(hope, length)], scored(finished if over else finished[-1:]))
            if over:
                break
    for one, other in itertools.combinations(scored(finished), 2):
        compare([one], [other])
    return finished, min(margins)
