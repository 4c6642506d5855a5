"""Identity, prompt and edit scores on held-out subjects, with their controls; tables and reports."""
