"""`Conversation`: turns on one cache are the text computed at once, and compute only what is new."""

import jax
import numpy as np
import pytest
from flax import nnx

import lucid_jax as lj
from lucid_jax.decode import conversation, generate
from lucid_jax.models import Transformer
from tests.helpers import TINY_CONFIG

CACHES = {
    "default": None,
    "dynamic": lj.Dynamic(),
    "ring": lj.Sliding(400),
    "int8": lj.Static(200, codec=lj.codecs.Int8()),
}


@pytest.fixture(scope="module")
def model():
    return Transformer(TINY_CONFIG, rngs=nnx.Rngs(3))


def said(talk, tokens, **options):
    return [token for part in talk.say(tokens, **options) for token in part]


@pytest.mark.parametrize("name", CACHES)
def test_turns_are_one_text(model, name):
    talk = lj.Conversation(model, cache=CACHES[name], capacity=200)
    text = []
    for turn in ([1, 2, 3], [7], list(range(20, 60))):
        text += turn
        answer = said(talk, turn, max_new_tokens=12)
        cache = lj.Static(200) if CACHES[name] is None else CACHES[name]
        assert answer == generate(model, [text], max_new_tokens=12, cache=cache).rows()[0]
        text += answer
        assert talk.stored == len(text) - 1


def test_only_what_is_new_goes_through_the_model(model, monkeypatch):
    fed = []

    def counting(structure, params, cache, tokens, *rest):
        fed.append(tokens.shape[1])
        return prefill(structure, params, cache, tokens, *rest)

    prefill = conversation.prefill
    monkeypatch.setattr(conversation, "prefill", counting)
    talk = lj.Conversation(model)
    for count in (30, 2, 1):
        said(talk, range(1, count + 1), max_new_tokens=5)
    assert fed == [30, 1 + 2, 1 + 1]


def test_what_ends_an_answer_begins_the_next_turn(model):
    answer = said(lj.Conversation(model), [1, 2, 3], max_new_tokens=8)
    stop = answer[4]
    end = answer.index(stop)
    talk = lj.Conversation(model, stop_tokens=[stop])
    assert said(talk, [1, 2, 3], max_new_tokens=8) == answer[: end + 1]
    assert talk.stored == 3 + end  # the stop token is neither stored nor waiting
    again = said(talk, [stop, 9], max_new_tokens=3)
    whole = [1, 2, 3, *answer[: end + 1], 9]
    assert again[0] == generate(model, [whole], max_new_tokens=1).rows()[0][0]


def test_an_answer_that_is_left_early_stays_as_far_as_it_came(model):
    talk = lj.Conversation(model)
    whole = said(lj.Conversation(model), [1, 2, 3], max_new_tokens=20)
    parts = talk.say([1, 2, 3], max_new_tokens=20, tokens_per_call=4)
    heard = next(parts) + next(parts)
    parts.close()
    assert heard == whole[:5]
    went_on = said(talk, [9], max_new_tokens=4)
    assert went_on == generate(model, [[1, 2, 3, *heard, 9]], max_new_tokens=4).rows()[0]


def test_a_full_cache_refuses_the_turn_and_stays_as_it_was(model):
    talk = lj.Conversation(model, capacity=20)
    assert len(said(talk, [1] * 10, max_new_tokens=40)) == 11  # the last one needs no slot
    with pytest.raises(ValueError, match=r"a turn of 2 tokens after 20 does not fit .* Reset"):
        said(talk, [2], max_new_tokens=1)
    assert talk.stored == 20
    talk.reset()
    assert talk.stored == 0
    assert len(said(talk, [1] * 20, max_new_tokens=4)) == 1


def test_it_never_ends_on_a_window(model):
    talk = lj.Conversation(model, cache=lj.Sliding(16, sinks=2))
    size = lj.nbytes(talk.cache)
    for _ in range(5):
        assert len(said(talk, [1, 2, 3], max_new_tokens=20)) == 20
    assert talk.stored == 5 * 23 - 1
    assert lj.nbytes(talk.cache) == size


def test_reset_says_the_same_again(model):
    sampling = lj.Sampling(1.0, repetition_penalty=1.3)
    talk = lj.Conversation(model, sampling=sampling, seed=4)
    first = [said(talk, [1, 2], max_new_tokens=9) for _ in range(2)]
    talk.reset()
    assert [said(talk, [1, 2], max_new_tokens=9) for _ in range(2)] == first
    assert first[0] != first[1]


def test_a_penalty_remembers_earlier_turns(model):
    talk = lj.Conversation(model, sampling=lj.Sampling(repetition_penalty=1e9))
    answers = said(talk, [1], max_new_tokens=9) + said(talk, [1], max_new_tokens=9)
    assert len(set(answers)) == len(answers)


def test_bad_turns_are_refused_before_anything_moves(model):
    talk = lj.Conversation(model)
    heard = said(talk, [1, 2], max_new_tokens=3)
    for tokens, message in (([], "empty"), ([10**6], "must be in")):
        with pytest.raises(ValueError, match=message):
            said(talk, tokens, max_new_tokens=3)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1"):
        said(talk, [1], max_new_tokens=0)
    assert (
        said(talk, [5], max_new_tokens=3)
        == (generate(model, [[1, 2, *heard, 5]], max_new_tokens=3).rows()[0])
    )


def test_an_interrupted_turn_says_so(model, monkeypatch):
    talk = lj.Conversation(model)
    with monkeypatch.context() as patched:

        def interrupted(*_):
            raise KeyboardInterrupt

        patched.setattr(conversation, "start_loop", interrupted)
        with pytest.raises(KeyboardInterrupt):
            said(talk, [1], max_new_tokens=2)
    with pytest.raises(RuntimeError, match="reset the conversation"):
        said(talk, [1], max_new_tokens=2)
    talk.reset()
    np.testing.assert_array_equal(jax.tree.leaves(talk.cache)[-1], False)
    assert len(said(talk, [1], max_new_tokens=2)) == 2
