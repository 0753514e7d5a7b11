"""The typed schema as Hydra sees it: `MoeConfig` plus the one ``_target_``, outside of the users' ``moe`` group."""

from dataclasses import dataclass

from hydra.core.config_store import ConfigStore

from .config import MoeConfig


@dataclass
class MoeNode(MoeConfig):
    """What ``moe/qwen3.yaml`` starts from. ``hydra.utils.instantiate`` of it calls `moefactory.factory.from_nodes`."""

    _target_: str = "moefactory.factory.from_nodes"
    _recursive_: bool = False  # the factory gets the nodes and checks them itself: no nested _target_ is ever called


def register() -> None:
    """Put the schema into Hydra's ConfigStore under ``moefactory/schema`` (idempotent)."""
    store = ConfigStore.instance()
    if "moefactory" not in store.repo:  # Hydra 1.4 warns of a second registration
        store.store(group="moefactory/schema", name="moe", node=MoeNode, provider="moefactory")
