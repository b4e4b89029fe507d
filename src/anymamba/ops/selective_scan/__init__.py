"""The selective scan: `api` is the contract, `checks` what it refuses, `registration` what torch knows of it."""

from anymamba.ops.selective_scan.api import ScanOutput, selective_scan, selective_scan_step
from anymamba.ops.selective_scan.checks import B_DISCRETIZATIONS

__all__ = ["B_DISCRETIZATIONS", "ScanOutput", "selective_scan", "selective_scan_step"]
