"""Profiles become plans; cut models are repaired. Reaches engines only through leap_serve's protocol."""
