"""Where the nodes of a small picture stand: by fast-sugiyama where it is installed, else by networkx's layers."""

from __future__ import annotations

from collections.abc import Sequence

Edge = tuple[int, int]
Point = tuple[float, float]


def layered(count: int, edges: Sequence[Edge], width: float, height: float) -> dict[int, Point]:
    """Centres of nodes ``0 .. count - 1``, layers ``height`` apart from top to bottom, neighbours ``width`` apart."""
    found = _sugiyama(edges) if edges else {}
    if found is None:
        found = _networkx(edges)
    lonely = [node for node in range(count) if node not in found]
    right = max((x for x, _ in found.values()), default=-1.0) + 1
    found |= {node: (right + place, 0.0) for place, node in enumerate(lonely)}
    left, top = min(x for x, _ in found.values()), min(y for _, y in found.values())
    return {node: ((x - left) * width, (y - top) * height) for node, (x, y) in sorted(found.items())}


def _sugiyama(edges: Sequence[Edge]) -> dict[int, Point] | None:
    """In units of one node and one layer; None without fast-sugiyama."""
    try:
        from fast_sugiyama import from_edges
    except ImportError:
        return None
    unit = 72.0
    layouts = from_edges(edges, vertex_spacing=unit, dummy_vertices=True).dot_layout()
    nodes = {node for edge in edges for node in edge}
    return {node: (x / unit, -y / unit) for node, (x, y) in layouts.to_dict().items() if node in nodes}


def _networkx(edges: Sequence[Edge]) -> dict[int, Point]:
    import networkx

    graph = networkx.DiGraph(list(edges))
    found: dict[int, Point] = {}
    for layer, nodes in enumerate(networkx.topological_generations(graph)):
        above = {node: [found[source][0] for source in graph.predecessors(node) if source in found] for node in nodes}
        order = sorted(nodes, key=lambda node: (sum(above[node]) / len(above[node]) if above[node] else 0.0, node))
        found |= {node: (place - (len(order) - 1) / 2, float(layer)) for place, node in enumerate(order)}
    return found
