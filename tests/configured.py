"""Small configurations, changed by nested dicts."""


def deep_merge(tree, changes):
    merged = dict(tree)
    for name, value in changes.items():
        merged[name] = deep_merge(merged.get(name, {}), value) if isinstance(value, dict) else value
    return merged
