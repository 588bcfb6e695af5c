"""Everything about one Problem in one page: see :func:`make_report`."""
