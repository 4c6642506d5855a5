"""Identity, prompt and edit scores on held-out subjects, with controls; tables and reports."""
