"""Files of a run: checkpoints, progress of unfinished work, provenance, the run folder."""

from .checkpoints import check_config, fingerprint, load_checkpoint, save_checkpoint
from .files import replacing, rounded, write_file, write_json
from .progress import Progress, Saving
from .provenance import code_hash, device_name, provenance
from .run_folder import measured_once, read_config, working_in, write_log
