"""Our losses, gradients, actions and updates against those of the authors' own code.

authors.npz holds what the agents of github.com/Xyu-Chern/DOAL (commit 155f517) computed on small networks. The noise of
every draw was a function of its shape, and so it is here. Their flow's time is 1 - t: so our network gets 1 - t here.
An actor's loss is their total less the other networks'; of dtrigflow also less -mean Q(s, a), a constant that theirs
holds more. Of iql there are critic, value and target: their actor differs.
"""

import dataclasses

import pytest
from conftest import load_algo, slow_except
from reference import Recorded

VALUES = {"num_samples": 4, "num_target_samples": 4, "alpha": 30.0, "delta": 0.1, "alpha_critic": 0.1}
FLOWS = ["ifql", "difql", "mfql", "dmfql", "mfql_bptt", "mfrebrac", "dmfrebrac"]
DIFFUSIONS = ["trigflow", "dtrigflow", "etrigflow"]


def start(name):
    """What they computed, the algorithm, and its arguments."""
    algo = load_algo(name)
    fields = {field.name for field in dataclasses.fields(algo.Args)}
    values = {key: value for key, value in VALUES.items() if key in fields}
    return Recorded("authors", name), algo, algo.Args(hidden_dims=(24, 24, 24), **values)


@pytest.mark.parametrize("name", slow_except([*FLOWS, *DIFFUSIONS], "difql", "dtrigflow", "dmfql", "dmfrebrac"))
def test_losses_gradients_and_actions_are_the_authors(name, monkeypatch):
    recorded, algo, args = start(name)
    recorded.check_losses_gradients_and_actions(algo, args, monkeypatch, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iql", *FLOWS, *DIFFUSIONS])
def test_twenty_updates_are_the_authors(name, monkeypatch):
    recorded, algo, args = start(name)
    recorded.check_twenty_updates(algo, args, monkeypatch)
