"""Read and write texts of any length with an exported model: sessions, chat, session files."""

from comet_megatron.inference.chat import CometChat
from comet_megatron.inference.session import CometSession

__all__ = ["CometChat", "CometSession"]
