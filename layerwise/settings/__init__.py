"""The words and values that everything else is told: fields with units, their identity, the code they bring."""
