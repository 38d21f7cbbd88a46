"""Plan -> Program -> text: lower a plan to statements and write them as Python. No method's name appears here."""
