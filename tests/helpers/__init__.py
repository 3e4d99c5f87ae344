"""What tests share: tiny models and pairs, folders of runs, launchers. Nothing here is a test."""
