from phantom.cli import main

main()
