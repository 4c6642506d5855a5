"""Encoders: from images to ``ImageFeatures``, attributes, faces and identities."""
