"""
Imported before transformers, to hide its advice to install torchvision: nothing here needs it, and one that
does not fit breaks imports.
"""

import logging


logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "Install torchvision" not in record.getMessage()
)
