import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from speechalign.config.policy import ArConfig
from speechalign.policy.ar import build_ar
from speechalign.policy.representation import answer_representations, spoken_codes
from speechalign.policy.vocabulary import EOS_ID, Vocabulary

PROMPT = (2, 9, 4, 11, 5)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    vocabulary = Vocabulary(symbols=" ab", num_codebooks=1, codebook_size=8)
    return build_ar(ArConfig(num_layers=2, hidden_size=16, num_heads=2), vocabulary).eval()


def test_a_representation_is_the_mean_of_the_last_states_over_the_codes(model: PreTrainedModel):
    answer = (9, 10, 12)
    with torch.no_grad():
        output = model(torch.tensor([[*PROMPT, *answer]]), output_hidden_states=True)
    expected_D = output.hidden_states[-1][0, len(PROMPT) :].mean(0)
    (found_D,) = answer_representations(model, [(PROMPT, (*answer, EOS_ID))])
    np.testing.assert_allclose(found_D, expected_D.numpy(), atol=1e-5)


def test_rows_keep_their_order_and_padding_changes_nothing(model: PreTrainedModel):
    rows = [(PROMPT, tuple(range(9, 9 + length))) for length in (5, 1, 3)] * 7  # two batches
    together_ND = answer_representations(model, rows)
    alone_ND = np.concatenate([answer_representations(model, [row]) for row in rows])
    np.testing.assert_allclose(together_ND, alone_ND, atol=1e-5)


def test_an_answer_of_the_stop_token_alone_says_nothing():
    assert spoken_codes((EOS_ID,)) == ()
    assert spoken_codes(()) == ()
    assert spoken_codes((9, 10)) == (9, 10)
