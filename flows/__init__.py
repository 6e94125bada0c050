"""Composes the tasks, schedules them, and is the face to the user (`d2r`)."""
