from atdiag.reports.drawing import import_matplotlib

import_matplotlib()  # before any module here does
