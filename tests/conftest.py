"""Options and fixtures that the tests share."""

from __future__ import annotations


def pytest_addoption(parser):
    """Let the whole product of networks, exporters and plantings be asked for."""
    parser.addoption("--full-zoo", action="store_true", help="every network x exporter x shapes x planting")


def pytest_collection_modifyitems(config, items):
    """Leave out what only the full product needs."""
    if config.getoption("--full-zoo"):
        return
    kept = [item for item in items if item.get_closest_marker("full_zoo") is None]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def pytest_configure(config):
    """Name the marker of the full product."""
    config.addinivalue_line("markers", "full_zoo: runs with --full-zoo only")
