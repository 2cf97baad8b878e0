"""The verb `certify`: start ranks on this machine, compare, write the certificate."""

from __future__ import annotations

from pathlib import Path

import torch

from core.files import write_json
from core.origin import sources_digest
from launch.ranks import Pool
from train.certificates import keep
from train.certify import CertifyConfig, certificate, certify


def run(config: CertifyConfig) -> int:
    """0 where every comparison holds, 1 where one does not."""
    pool = Pool()
    try:
        outcomes = certify(config, pool, print)
    finally:
        pool.close()
    content = certificate(config, outcomes, {"sources": sources_digest(), "torch": torch.__version__})
    path = Path(config.out).expanduser()
    write_json(path, content)
    if content["pass"]:
        keep(content, Path(config.cache).expanduser())
        print(f"certified: {', '.join(content['axes'])} compute what one process computes; see {path}")
        return 0
    print(f"NOT certified: {' with '.join(content['smallest_failing_axes'])}: {content['first_failure']}; see {path}")
    return 1
