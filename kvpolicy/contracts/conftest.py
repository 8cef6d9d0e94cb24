"""One thread of torch: on tensors this small more of them only wait for each other."""


def pytest_collection_finish() -> None:
    """Not before: the process that hands tests to others runs none, and needs no torch."""
    import torch

    torch.set_num_threads(1)
