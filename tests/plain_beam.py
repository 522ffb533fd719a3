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

    def compare(score, length, other, other_length):
        """Notes by how much both sums may be off before the two scores change places."""
        rates = length**-length_penalty + other_length**-length_penalty
        margins.append(abs(score - other) / rates)

    def cut(ranked, finished=False):
        """The `width` best of what is sorted."""
        if len(ranked) > width:
            (score, text), (other, other_text) = ranked[width - 1 : width + 1]
            lengths = (len(text), len(other_text)) if finished else (1, 1)  # sums are not divided
            compare(score, lengths[0], other, lengths[1])
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
        finished = cut(sorted(finished, key=lambda f: -f[0]), finished=True)
        if over:
            break
        live = cut([c for c in candidates if c[1][-1] not in stops])
        if len(finished) == width:
            if early_stopping is True:
                break
            length = new if early_stopping == "never" and length_penalty > 0 else n
            hope = live[0][0] / length**length_penalty
            worst, text = finished[-1]
            compare(hope, length, worst, len(text))
            if hope <= worst:
                break
    for (score, text), (other, other_text) in itertools.pairwise(finished):
        compare(score, len(text), other, len(other_text))
    return finished, min(margins)
