"""Imported before transformers, to hide its advice to install torchvision, which nothing here needs."""

import logging


logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "Install torchvision" not in record.getMessage()
)
