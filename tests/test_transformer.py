"""A Hugging Face model over its own batches, beside plain autograd."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BatchEncoding, BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel

import hesse
from oracle import hessian_matrix, relative_error


def language_model():
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = GPT2Config(vocab_size=7, n_positions=6, n_embd=4, n_layer=1, n_head=2, **ends)
    return GPT2LMHeadModel(config).eval().double()


def batch(*lengths):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    tokens = torch.randint(1, 7, mask.shape)
    labels = tokens.masked_fill(mask == 0, -100)
    return BatchEncoding({"input_ids": tokens * mask, "attention_mask": mask, "labels": labels})


def predicted(batch):
    return int((batch["labels"][:, 1:] != -100).sum())


def by_hand(model, evaluate):
    """The Hessian of a scalar of the model, by double backward of every entry of the gradient."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return hessian_matrix(lambda *leaves: evaluate(dict(zip(names, leaves, strict=True))), parameters)


def flat(answer):
    return torch.cat([part.flatten() for part in answer.values()])


def logits(model, batch):
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def of_tokens(z, batch):
    return torch.nn.functional.cross_entropy(z[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.fixture
def spoken():
    """Model, batches of two lengths, and the Hessian of the mean over all their tokens."""
    model, batches = language_model(), [batch(5, 4, 2), batch(3, 3)]

    def mean_over_tokens(leaves):
        total = 0
        for b in batches:
            inputs = {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"]}
            z = torch.func.functional_call(model, leaves, (), inputs).logits
            total = total + of_tokens(z, b) * predicted(b)
        return total / sum(map(predicted, batches))

    return model, batches, by_hand(model, mean_over_tokens)


def assert_all(loss, expected, tolerance):
    V = torch.randn(len(expected), 3, dtype=torch.float64)
    v = {name: torch.randn_like(p) for name, p in loss.params.items()}
    assert relative_error(flat(hesse.hessian_diagonal(loss)), expected.diagonal()) < tolerance
    assert relative_error(flat(hesse.hvp(loss, v)), expected @ flat(v)) < tolerance
    assert relative_error(hesse.HessianOperator(loss) @ V, expected @ V) < tolerance


def test_hessian_over_batches_of_two_lengths(spoken):
    model, batches, expected = spoken
    assert_all(hesse.Loss(model, of_tokens, batches, samples=predicted, forward=logits), expected, 1e-10)


@pytest.mark.filterwarnings("ignore:func is given torch.float64 and computes:hesse.errors.PrecisionWarning")
def test_hessian_of_the_loss_that_the_model_gives(spoken):
    """Which is computed in float32, whatever the model's dtype."""
    model, batches, expected = spoken
    assert_all(hesse.Loss(model, None, batches, samples=predicted), expected, 1e-5)


def test_gauss_newton_with_forward(spoken):
    model, batches, _ = spoken
    parameters, count = list(model.parameters()), sum(map(predicted, batches))
    expected = 0
    for b in batches:
        z = logits(model, b)
        rows = [torch.autograd.grad(entry, parameters, retain_graph=True) for entry in z.flatten()]
        J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
        K = hessian_matrix(lambda z, b=b: of_tokens(z, b), [z])
        expected = expected + predicted(b) / count * J.T @ K @ J
    G = hesse.GaussNewtonOperator(hesse.Loss(model, of_tokens, batches, samples=predicted, forward=logits))
    assert relative_error(flat(G.diagonal()), expected.diagonal()) < 1e-10
    v = torch.randn(len(expected), dtype=torch.float64)
    assert relative_error(G @ v, expected @ v) < 1e-10


def test_a_classifier_from_a_loader():
    config = BertConfig(
        vocab_size=7,
        hidden_size=4,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=6,
        max_position_embeddings=6,
        num_labels=3,
    )
    model = BertForSequenceClassification(config).eval().double()
    ids, labels = torch.randint(1, 7, (5, 4)), torch.randint(0, 3, (5,))
    samples = [{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)]
    loss = hesse.Loss(model, None, DataLoader(samples, batch_size=2))
    whole = {"input_ids": ids, "labels": labels}
    expected = by_hand(model, lambda leaves: torch.func.functional_call(model, leaves, (), whole).loss)
    assert relative_error(flat(hesse.hessian_diagonal(loss)), expected.diagonal()) < 1e-10
