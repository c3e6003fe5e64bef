"""Seconds that collectives take over the links of a machine.

A ring moves ``(n - 1) / n`` of all bytes over every link for an all-gather or a reduce-scatter, in n - 1 steps, and
twice as much for an all-reduce. Over several nodes each device first works with its own node, and the devices of one
place in every node then have a ring of their own over the network, for their share of the bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sparsetrain.cost.hardware import Link, Machine
from sparsetrain.cost.sizes import Number
from sparsetrain.errors import UserError


@dataclass(frozen=True)
class Group:
    """Devices that communicate with each other.

    Args:
        size: devices.
        near: how many of them share a node.
        inner: link in a node; None if a node has one device.
        outer: link between nodes; None if there is one node.
    """

    size: Number
    near: Number
    inner: Link | None
    outer: Link | None

    def all_gather(self, moved: Number) -> Number:
        """Return the seconds until every device has all ``moved`` bytes, of which each has an equal part."""
        far = self.size / self.near
        seconds = _ring(moved, self.near, self.inner)
        return seconds + _ring(moved / self.near, far, self.outer)

    def reduce_scatter(self, moved: Number) -> Number:
        """Return the seconds until every device has the sum of an equal part of ``moved`` bytes."""
        return self.all_gather(moved)

    def all_reduce(self, moved: Number) -> Number:
        """Return the seconds until every device has the sum of ``moved`` bytes."""
        return self.all_gather(moved) + self.reduce_scatter(moved)

    def send(self, moved: Number) -> Number:
        """Return the seconds in which a device hands ``moved`` bytes to its neighbour, in its node if it shares one."""
        inner, outer = (
            0.0 if link is None else moved / link.rate + link.latency.value for link in (self.inner, self.outer)
        )
        return np.where(np.asarray(self.size) <= 1, 0.0, np.where(np.asarray(self.near) >= self.size, inner, outer))


def group(machine: Machine, size: Number, stride: Number) -> Group:
    """Return devices that are ``stride`` apart.

    Raises:
        UserError: the machine's file has no link that joins this number of devices.
    """
    links = sorted(machine.links, key=lambda link: link.devices)
    span = np.max(np.asarray(size * stride))
    if np.any(np.asarray(size) > 1) and (not links or links[-1].devices < span):
        most = links[-1].devices if links else 1
        raise UserError(f"{span:g} devices of {machine.name}: its links join at most {most}")
    if not links:
        return Group(size, size, None, None)
    node = links[0].devices
    near = np.minimum(size, np.maximum(np.floor(node / np.asarray(stride, dtype=float)), 1.0))
    return Group(size, near, links[0], links[-1])


def _ring(moved: Number, devices: Number, link: Link | None) -> Number:
    """Return the seconds of an all-gather by a ring; a group of one device communicates nothing."""
    if link is None:
        return 0.0
    steps = np.maximum(np.asarray(devices, dtype=float) - 1.0, 0.0)
    return steps / np.maximum(devices, 1.0) * moved / link.rate + steps * link.latency.value
