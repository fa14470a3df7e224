"""What the OpenVINO target is made of: writing a program as IR, running it, looking into the compiled model."""
