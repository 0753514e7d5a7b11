"""Makes ``defaults: - moe: qwen3`` work in any Hydra application of this environment.

Hydra imports every plugin at the start of every application, so this file loads nothing heavy. Hydra 1.3 finds it by
its place in ``hydra_plugins``, Hydra 1.4 by the entry point ``hydra.plugins``.
"""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class MoefactorySearchPath(SearchPathPlugin):
    """Appends the presets to the search path (the user's own files win) and registers the typed schema."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Called once by Hydra for each application."""
        from moefactory.schema import register

        register()
        search_path.append(provider="moefactory", path="pkg://moefactory.conf")
