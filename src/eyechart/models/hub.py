"""What the Hugging Face cache on this machine holds."""


def cached_on_hub() -> list[str]:
    """Names of the models in the Hugging Face cache, sorted; empty where there is no cache."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    return sorted(repo.repo_id for repo in repositories if repo.repo_type == "model")
