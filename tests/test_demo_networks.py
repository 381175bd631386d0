"""The demo's data, networks and training."""

import dataclasses

import numpy as np
import pytest
import torch

from etp_deploy.demo.data import load_digits
from etp_deploy.demo.networks import (
    CLASSES,
    IMAGE_SHAPE,
    NETWORKS,
    ConvNet,
    VisionTransformer,
    build,
    parameters,
)
from etp_deploy.demo.train import RECIPES, accuracy, train
from etp_deploy.errors import UsageError
from etp_deploy.training import TorqueRegularizer

#: Long enough to lose channels and to learn more than chance.
SHORT = dataclasses.replace(RECIPES["vgg"], beta=0.15, pruning=3, tuning=1)


def test_split_is_fixed_and_disjoint():
    """Two loads give the same images, held-out ones are not trained on, and all classes are in both parts."""
    one, two = load_digits(), load_digits()
    np.testing.assert_array_equal(one.test_images, two.test_images)
    np.testing.assert_array_equal(one.train_labels, two.train_labels)
    assert (len(one.train_images), len(one.test_images)) == (1347, 450)
    held_out = {image.tobytes() for image in one.test_images}
    assert not held_out & {image.tobytes() for image in one.train_images}
    assert set(one.train_labels) == set(one.test_labels) == set(range(CLASSES))


def test_images_are_what_the_networks_take():
    """Images are float32 of the networks' shape within [-1, 1], labels int64."""
    digits = load_digits()
    for images, labels in (
        (digits.train_images, digits.train_labels),
        (digits.test_images, digits.test_labels),
    ):
        assert images.dtype == np.float32
        assert labels.dtype == np.int64
        assert images.shape[1:] == IMAGE_SHAPE
        assert (images.min(), images.max()) == (-1.0, 1.0)


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_take_any_batch(name):
    """A network gives ten logits for each image, the same whatever shares its batch."""
    torch.manual_seed(0)
    network = build(name).eval()
    images = torch.randn(3, *IMAGE_SHAPE)
    logits = network(images)
    assert logits.shape == (3, CLASSES)
    torch.testing.assert_close(network(images[1:2]), logits[1:2], rtol=1e-4, atol=1e-5)


def test_unknown_network_is_refused():
    """A network that does not exist is a usage error which names those that do."""
    with pytest.raises(UsageError, match="vgg"):
        build("resnet")


@pytest.mark.parametrize("name", NETWORKS)
def test_groups_fit_their_network(name):
    """The declared groups exist in the network, and cover the widths that it was built from."""
    network = build(name)
    counts = [group.count(network) for group in network.groups()]
    if isinstance(network, ConvNet):
        assert tuple(counts) == network.widths
    else:
        assert tuple(counts[::2]) == network.heads
        assert tuple(counts[1::2]) == network.hidden


def kill(network, group, module):
    """Zero one module of a group in all its parts."""
    with torch.no_grad():
        for part in group.parts:
            weight = network.get_parameter(part.parameter)
            weight.index_fill_(part.axis, torch.nonzero(part.modules(weight) == module).reshape(-1), 0.0)


def test_a_dead_filter_is_a_constant_channel():
    """A dead filter's channel no longer depends on the image, though its constant is not zero."""
    torch.manual_seed(0)
    network = ConvNet((4, 4)).eval()
    kill(network, network.groups()[0], 2)
    with torch.no_grad():
        network.norms[0].bias.fill_(0.5)
        channels = network.norms[0](network.convolutions[0](torch.randn(2, *IMAGE_SHAPE)))
    assert torch.equal(channels[:, 2], torch.full((2, 8, 8), 0.5))
    assert channels[:, 1].std() > 0


def test_dead_heads_and_neurons_can_be_cut_out():
    """The transformer without its dead modules, copied into the reduced network, computes the same."""
    torch.manual_seed(0)
    network = VisionTransformer((2, 3), (5, 4), width=8, head_dim=4).eval()
    for index, module in ((0, 1), (1, 0), (1, 3), (2, 0), (2, 2), (3, 1)):
        kill(network, network.groups()[index], module)
    dead = TorqueRegularizer(network, groups=network.groups()).dead()
    reduced = network.reduced(dead).eval()
    assert (reduced.heads, reduced.hidden) == ((1, 1), (3, 3))
    state = network.state_dict()
    for block in range(2):
        rows = (~dead[f"blocks.{block}.attention"]).repeat_interleave(4)
        hidden = ~dead[f"blocks.{block}.mlp"]
        for layer in ("query", "key", "value"):
            for kind in ("weight", "bias"):
                name = f"blocks.{block}.attention.{layer}.{kind}"
                state[name] = state[name][rows]
        for kind in ("weight", "bias"):
            state[f"blocks.{block}.fc1.{kind}"] = state[f"blocks.{block}.fc1.{kind}"][hidden]
        name = f"blocks.{block}.attention.output.weight"
        state[name] = state[name][:, rows]
        name = f"blocks.{block}.fc2.weight"
        state[name] = state[name][:, hidden]
    reduced.load_state_dict(state)
    images = torch.randn(2, *IMAGE_SHAPE)
    torch.testing.assert_close(reduced(images), network(images))


@pytest.mark.parametrize("name", NETWORKS)
def test_reduced_network_of_nothing_dead_is_the_same_size(name):
    """With nothing dead the reduced network has every parameter, with all dead one module a group."""
    network = build(name)
    nothing = {group.name: torch.zeros(group.count(network), dtype=torch.bool) for group in network.groups()}
    assert parameters(network.reduced(nothing)) == parameters(network)
    least = network.reduced({name: ~modules for name, modules in nothing.items()})
    assert all(group.count(least) == 1 for group in least.groups())


def test_short_training_loses_channels_and_learns():
    """ETP training leaves exact zeros, counts them, keeps the dead dead while tuning, and still learns."""
    seen = []
    trained = train("vgg", etp=True, seed=0, progress=seen.append, recipe=SHORT)
    assert tuple(seen) == trained.history
    assert [epoch.number for epoch in seen] == [1, 2, 3, 4]
    dead = sum(row.dead for row in trained.statistics)
    assert 50 < dead < sum(row.total for row in trained.statistics)
    zero_filters = sum(int((c.weight == 0).flatten(1).all(1).sum()) for c in trained.module.convolutions)
    assert zero_filters == dead == seen[-1].dead
    assert seen[-2].dead == seen[-1].dead
    assert trained.remaining < parameters(trained.module) / 2
    assert trained.accuracy > 0.5
    digits = load_digits()
    assert trained.accuracy == accuracy(trained.module, digits.test_images, digits.test_labels)
    assert not trained.module.training


def test_dense_training_is_reproducible_and_loses_nothing():
    """A seed fixes the weights, nothing dies, and torch's generator and threads stay as they were."""
    recipe = dataclasses.replace(SHORT, pruning=1, tuning=0)
    state, threads = torch.random.get_rng_state(), torch.get_num_threads()
    one, two, other = (train("vgg", etp=False, seed=seed, recipe=recipe) for seed in (3, 3, 4))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.get_num_threads() == threads
    assert torch.equal(one.module.convolutions[0].weight, two.module.convolutions[0].weight)
    assert one.history == two.history
    assert not torch.equal(one.module.convolutions[0].weight, other.module.convolutions[0].weight)
    assert not any(row.dead for row in one.statistics)
    assert one.remaining == parameters(one.module)
