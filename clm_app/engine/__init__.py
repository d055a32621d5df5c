"""The hot room: what the training child runs. torch is at home here."""
