"""The kinds of data and of answers, each behind one face."""
