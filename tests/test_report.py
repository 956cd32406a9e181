"""The report: one page that asks for nothing, its figures those of metrics.json, nothing of a file taken for markup."""

from __future__ import annotations

import html
import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from tiny_run import make_run

from scaling.config import Settings, flatten, make_settings, merge
from scaling.data.scene_source import EMBEDDED
from scaling.library.failures import FailureLog
from scaling.library.fitted_scenes import pack_scene
from scaling.library.parts import commit_part
from scaling.library.report import run_labels, write_report
from scaling.library.report_figures import Cost, noted_settings, read_figures
from scaling.library.report_pictures import principal_colours
from scaling.library.report_tables import bytes_text, seconds_text
from scaling.library.run_folder import RunFolder, settings_hash
from scaling.library.summary import summarise
