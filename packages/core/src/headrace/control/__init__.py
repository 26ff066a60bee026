"""The control channel: who may speak, and what the coordinator and its peers say. Weights never pass here."""

from headrace.control.dialer import Dialer
from headrace.control.hub import Hub
from headrace.control.keys import KeyPair, TokenBook, new_token
from headrace.control.peers import Event, Lost, PeerId, Received

__all__ = ["Dialer", "Event", "Hub", "KeyPair", "Lost", "PeerId", "Received", "TokenBook", "new_token"]
