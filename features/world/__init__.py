"""The users in the loop: a simulator calibrated to KuaiRand, or a user model fitted on a real log."""
