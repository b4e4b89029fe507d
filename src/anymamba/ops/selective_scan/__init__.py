"""The selective scan: public functions in `api`, argument checks in `checks`, torch's op in `registration`."""

from anymamba.ops.selective_scan.api import ScanOutput, selective_scan, selective_scan_step
from anymamba.ops.selective_scan.checks import B_DISCRETIZATIONS

__all__ = ["B_DISCRETIZATIONS", "ScanOutput", "selective_scan", "selective_scan_step"]
