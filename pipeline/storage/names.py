"""What the files of artefacts are called, by the folder that holds them."""

# A checkpoint; segvit.checkpoint writes the first two.
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CHECKPOINT_FILES = (WEIGHTS_FILE, CONFIG_FILE)
PUBLISHED_SUFFIXES = (".pth", ".pt", ".safetensors")  # of files of the published format
HISTORY_FILE = "history.jsonl"

# A shard set
MANIFEST = "manifest.json"
INDEX = "index.parquet"
QUARANTINE = "quarantine.parquet"

# A search
TRIALS_FILE = "trials.json"
TRIALS_FOLDER = "trials"

# An evaluation
CONFUSION_FILE = "confusion.json"
COUNTS_FILE = "counts.parquet"
SCORES_FILE = "images.json"
EXAMPLES_FILE = "examples.json"
EXAMPLES_FOLDER = "examples"
PROBE_FOLDER = "probe"
PROBE_IMAGES = "images.npy"
PROBE_LABELS = "labels.npy"

# A registered model
CHECKPOINT_FOLDER = "artifacts/checkpoint"

REPORT_FILE = "report.html"
BACKBONE_FILE = "backbone.safetensors"
STUDY_TABLE = "study.parquet"
STUDY_TEXT = "study.md"
STUDY_PAGE = "study.html"
