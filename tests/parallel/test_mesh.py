"""Devices in several slices: data is split over the network between them, and nothing else is."""

from types import SimpleNamespace

import jax
import pytest

from dno_jax.config import MeshSection
from dno_jax.errors import DnoError
from dno_jax.parallel.mesh import abstract_mesh, make_mesh, own_submesh, slices_of


def tpus(*slices):
    return [SimpleNamespace(platform="tpu", slice_index=index, id=n) for n, index in enumerate(slices)]


def test_groups_of_fsdp_and_tensor_stay_within_a_slice():
    mesh = make_mesh(MeshSection(data=-1, fsdp=2, tensor=2, dcn_data=2))
    assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "expert": 1, "tensor": 2}
    devices = jax.devices()
    halves = [set(devices[:4]), set(devices[4:])]
    assert [set(group.ravel()) for group in mesh.devices] == halves
    # Four along data are two in each of two slices: the slices are the outer ones.
    mesh = make_mesh(MeshSection(data=4, fsdp=2, dcn_data=2))
    assert [set(group.ravel()) for group in mesh.devices.reshape(2, -1)] == halves
    assert make_mesh(MeshSection(data=4, fsdp=2)).devices.tolist() == mesh.devices.tolist()
    submesh = own_submesh(mesh).mesh
    assert submesh.devices.size == 8
    assert abstract_mesh(MeshSection(data=-1, fsdp=4, dcn_data=2), 32).shape["data"] == 8


def test_the_slices_that_tpus_say_they_are_in():
    mixed = tpus(1, 0, 1, 0)
    assert [[d.id for d in part] for part in slices_of(mixed, -1)] == [[1, 3], [0, 2]]
    assert slices_of(mixed, 2) == slices_of(mixed, -1)
    assert len(slices_of(tpus(0, 0), -1)) == 1
    others = [SimpleNamespace(platform="gpu", slice_index=index, id=n) for n, index in enumerate((0, 0, 1, 1))]
    assert len(slices_of(others, -1)) == 1  # hosts of one network; as slices only where the configuration says so
    assert [[d.id for d in part] for part in slices_of(others, 2)] == [[0, 1], [2, 3]]
    assert [[d.id for d in part] for part in slices_of(others, 4)] == [[0], [1], [2], [3]]


@pytest.mark.parametrize(
    ("devices", "count", "said"),
    [
        (tpus(0, 0, 1, 1), 4, r"mesh\.dcn_data is 4, and the 4 tpu devices of this run are in 2 slices"),
        (tpus(0, 0), 2, r"are in 1 slices; set mesh\.dcn_data"),
        (tpus(0, 0, 1), -1, "slices of this run have 2, 1 devices"),
    ],
)
def test_slices_that_make_no_mesh_are_refused(devices, count, said):
    with pytest.raises(DnoError, match=said):
        slices_of(devices, count)


def test_an_axis_that_would_cross_the_network_is_refused():
    for layout in (make_mesh, lambda section: abstract_mesh(section, 8)):
        with pytest.raises(DnoError, match=r"data=1, fsdp=8.* has 1 devices along data, which 2 slices do not divide"):
            layout(MeshSection(data=1, fsdp=8, dcn_data=2))
    with pytest.raises(ValueError, match="dcn_data is 0; expected a positive number of slices"):
        MeshSection(dcn_data=0)
