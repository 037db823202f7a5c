import platform
import threading

import pytest
import torch

from sae_lens_dfc.core.machine import resident_memory, return_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return it")
def test_memory_that_an_ended_thread_allocated_is_returned_once_freed() -> None:
    blocks: list[torch.Tensor] = []
    # 100 kB each, which glibc takes from the thread's own heap; and one at its end that stays.
    thread = threading.Thread(target=lambda: blocks.extend(torch.ones(25_000) for _ in range(600)))
    thread.start()
    thread.join()
    del blocks[:-1]
    before = resident_memory()
    return_freed_memory()
    assert before - resident_memory() > 40_000_000
