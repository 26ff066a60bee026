"""Rings of a broadcasting holder: slots that it fills and broadcasts, and that workers of its host apply from."""

from headrace.rings.cast import Cast, Ring
from headrace.rings.device import DeviceRing, Pins
from headrace.rings.host import HostRing

__all__ = ["Cast", "DeviceRing", "HostRing", "Pins", "Ring"]
