"""Images to ``ImageFeatures``, attributes, faces and identities."""
